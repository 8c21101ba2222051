"""One model: find its routers, check them, record and replay what they select."""
