"""A process of its own for the simulator, which may crash or hang there."""

from sbi_phys.sandbox.box import RowTimeoutError, Sandbox, SandboxDiedError

__all__ = ["RowTimeoutError", "Sandbox", "SandboxDiedError"]
