"""Buffer objects of graphics memory, as the kernel's TTM and GEM have them."""
