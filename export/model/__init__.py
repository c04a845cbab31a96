"""The exported model: its graph, and what is said and checked of it."""
