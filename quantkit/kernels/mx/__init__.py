"""Products of codes with block scales on both sides, by the tensor cores of sm_120: MXFP8, MXFP4, NVFP4."""
