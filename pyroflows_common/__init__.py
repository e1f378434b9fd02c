"""What the Pyro and the NumPyro wing share: code that imports neither host."""
