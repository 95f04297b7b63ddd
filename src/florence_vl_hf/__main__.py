# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
from florence_vl_cli import main


if __name__ == "__main__":
    main()
