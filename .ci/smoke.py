"""What an installation with nothing but torch must do. Run it outside the repository."""

import importlib.metadata
import importlib.util
import sys

import torch
import torch.nn.functional as F

import ngd_optim
from ngd_optim import NaturalCG, conjugate_gradient, linearize, plot_history

assert "site-packages" in ngd_optim.__file__, ngd_optim.__file__
assert importlib.metadata.version("ngd-optim") == ngd_optim.__version__
assert importlib.util.find_spec("ngd_lightning")
assert importlib.util.find_spec("ngd_rl")

torch.manual_seed(0)
x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
optimizer = NaturalCG(model.parameters())
losses = [optimizer.step(lambda: F.cross_entropy(model(x), y)).item() for _ in range(10)]
assert losses[-1] < 0.5 * losses[0], losses
assert optimizer.last_step.accepted, optimizer.last_step

point = linearize(lambda: F.cross_entropy(model(x), y), model.parameters())
solution = conjugate_gradient(lambda v: point.curvature(v) + v, -point.gradient)
assert solution.stop == "tolerance", solution

message = ""
try:
    plot_history([optimizer.last_step])
except ImportError as error:
    message = str(error)
assert "pip install matplotlib" in message, message

optional = {"lightning", "stable_baselines3", "matplotlib", "gymnasium"} & {
    name.split(".")[0] for name in sys.modules
}
assert not optional, f"imported without need: {optional}"
print(f"ngd_optim {ngd_optim.__version__} works with torch {torch.__version__} alone")
