"""What quantization costs and saves on the machine at hand, and what that machine can do."""

from cemq.bench.architectures import ARCHITECTURES, Architecture
from cemq.bench.bundle import bench_bundle
from cemq.bench.doctor import examine
from cemq.bench.forward import bench_architecture

__all__ = ["ARCHITECTURES", "Architecture", "bench_architecture", "bench_bundle", "examine"]
