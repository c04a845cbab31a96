"""Devices and machines: strategy and collectives."""
