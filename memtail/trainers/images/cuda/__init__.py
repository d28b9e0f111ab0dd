"""Training steps for CUDA devices: functions of tensors, captured in CUDA graphs. Tests run and compare them on a CPU."""
