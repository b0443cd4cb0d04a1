"""Quality of reuse: suites of questions under donor contexts, policies under one interface, detectors, plots."""
