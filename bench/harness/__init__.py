"""Parts that every benchmark uses: cases, timing, memory, environment, the run, the report."""
