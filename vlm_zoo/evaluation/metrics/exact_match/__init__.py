"""The `exact_match` metric; its class is in `exact_match.py`, the file that `evaluate.load` reads."""
