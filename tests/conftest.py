import os

from hypothesis import HealthCheck, settings

# Before anything loads torch: threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A busy machine is no reason to fail, and what is tried is the same each time.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
