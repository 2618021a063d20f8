"""`python -m nestling.ops.native`: compile the CPU kernel now, and say where it is."""

from nestling.ops.native.build import library

if __name__ == "__main__":
    found = library()
    print(f"CPU kernel: {found._name}" if found else "no CPU kernel; chunks run through torch")
