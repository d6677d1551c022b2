"""Working on an official Wan checkout: what it offers (doctor) and what it needs (patch). Nothing here imports it."""
