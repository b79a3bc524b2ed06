"""What `pyglobenc bench` and the benchmarks share: ceilings, costs and inputs."""
