"""How good a checkpoint's pictures are: the corpus, the metrics, the paper's tables."""
