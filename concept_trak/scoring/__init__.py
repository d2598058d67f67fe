"""rows + query -> scores: damped inverse Fisher, exact ranking, metrics of a ranking."""
