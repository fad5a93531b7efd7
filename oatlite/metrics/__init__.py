"""What a run says about itself: :mod:`records` on disk (:mod:`sinks`) and on the screen (:mod:`console`)."""
