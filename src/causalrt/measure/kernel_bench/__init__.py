"""Times of the fused kernels beside what torch has: cases, checks against float64, verdicts and a picture."""
