"""What travels with a checkpoint: flat files that import each other as siblings and nothing else of this package."""
