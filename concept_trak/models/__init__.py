"""eps(x_t, t, cond): pipelines, noise schedules, DDIM, conditions, learned words, devices."""
