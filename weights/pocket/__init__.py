"""The pocket weight set: the scripts that train it, the pictures they learn from and the trained files."""
