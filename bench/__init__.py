"""Benchmarks of speed and memory: python -m bench --help"""
