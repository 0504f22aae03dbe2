from tests import typecheck as typecheck  # found by name: setup.cfg, --jaxtyping-packages
