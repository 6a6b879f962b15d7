"""What all benchmarks share: cases, clocks, measurement, peers, profiles, tables and plots."""
