"""Finding the highest and lowest scores without reading every row: an index beside the store."""
