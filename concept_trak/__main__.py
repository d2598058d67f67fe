from .isolated import isolate

isolate()  # before anything else is imported, which the working folder might hold a file of

from .cli import main  # noqa: E402

raise SystemExit(main())
