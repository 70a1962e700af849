DEGREES = (1, 2, 4, 8, 16, 64)
def page(r): return ""
