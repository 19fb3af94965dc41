"""The report on a run and the viewer of embeddings. Training never imports this package."""
