"""Published per-layer plans, by name: plan.path=preset:NAME, --kvtuner-layer-config-file preset:NAME."""
