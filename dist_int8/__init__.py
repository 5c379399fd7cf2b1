"""Distributed int8 inference for transformer language models."""
