"""One small adapter per model family; `base` is the contract and the loader."""
