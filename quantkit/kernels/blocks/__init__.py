"""Products of e4m3 codes whose scales go by blocks along K: FP8 in blocks of 128, and MXFP8."""
