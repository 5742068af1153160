"""Run records to tables, plots and one page: gather, rank, show. No torch here."""
