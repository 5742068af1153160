"""Read run records, rank their results, and write tables, charts and an HTML page. Does not import torch."""
