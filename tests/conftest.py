import os

from hypothesis import HealthCheck, settings

# two cores in CI, several workers: torch's own threads would only fight
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a busy machine is no defect; CI looks at the same examples every time
settings.register_profile(
    "omnispeech",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("omnispeech")
