"""The analysis stage: reads the stores that `pipeline` wrote; never trains and never imports torch."""
