"""The `pope` metric; its class is in `pope.py`, the file that `evaluate.load` reads."""
