import modelopt_cli  # noqa: F401  (installs what makes torchvision importable)
