"""The exported model: graph, model card, warm-up requests and checks."""
