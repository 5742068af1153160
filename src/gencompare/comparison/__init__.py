"""Read run records, rank their results, and write tables, charts and a page. This package does not import torch."""
