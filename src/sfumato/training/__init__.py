"""What surrounds the loop: set-up, caching, validation, saving, diagnosis; the loop itself is train.py."""
