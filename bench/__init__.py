"""How fast, against what: python -m bench --help"""
