"""Measures devices, draws how busy stages are, and simulates what a schedule would gain."""
