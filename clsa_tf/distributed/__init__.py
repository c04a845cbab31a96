"""Devices and hosts: the choice of a strategy, and collective operations."""
