import os

# two cores in CI, several workers: torch's own threads would only fight
os.environ.setdefault("OMP_NUM_THREADS", "1")
