"""The parts of scripts/ablate.py: what to run, running it, the numbers, the tables and the picture."""
