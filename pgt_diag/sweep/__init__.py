"""Many runs: a grid of configurations, what is done of it, and the engines that do the rest."""
