"""What every benchmark uses: cases, timing, memory, the run, the report."""
