"""The Radiata pines of E. J. Williams, "Regression Analysis" (1959), and a prior for them.

Maximum compressive strength parallel to the grain, density, and density adjusted for resin of 42
specimens. The ninth row is (3670, 32.3, 29.0), as in the copies from which the literature has the
evidences -310.128 and -301.705 (Friel and Wyse, "Estimating the evidence - a review", Statistica
Neerlandica 2012); copies with (3160, 27.1, 26.3) there give -310.507 and -301.650.
"""

import numpy as np

STRENGTH = np.array([
    3040, 2470, 3610, 3480, 3810, 2330, 1800, 3110, 3670, 2310, 4360, 1880, 3670, 1740,
    2250, 2650, 4970, 2620, 2900, 1670, 2540, 3840, 3800, 4600, 1900, 2530, 2920, 4990,
    1670, 3310, 3450, 3600, 2850, 1590, 3770, 3850, 2480, 3570, 2620, 1890, 3030, 3030.0,
])  # fmt: skip
DENSITY = np.array([
    29.2, 24.7, 32.3, 31.3, 31.5, 24.5, 19.9, 27.3, 32.3, 24.0, 33.8, 21.5, 32.2, 22.5,
    27.5, 25.6, 34.5, 26.2, 26.7, 21.1, 24.1, 30.7, 32.7, 32.6, 22.1, 25.3, 30.8, 38.9,
    22.1, 29.2, 30.1, 31.4, 26.7, 22.1, 30.3, 32.0, 23.2, 30.3, 29.9, 20.8, 33.2, 28.2,
])  # fmt: skip
RESIN_ADJUSTED = np.array([
    25.4, 22.2, 32.2, 31.0, 30.9, 23.9, 19.2, 27.2, 29.0, 23.9, 33.2, 21.0, 29.0, 22.0,
    23.8, 25.3, 34.2, 25.7, 26.4, 20.0, 23.9, 30.7, 32.6, 32.5, 20.8, 23.1, 29.8, 38.1,
    21.3, 28.5, 29.2, 31.4, 25.9, 21.4, 29.8, 30.6, 22.6, 30.3, 23.8, 18.4, 29.4, 28.2,
])  # fmt: skip
# Means of intercept and slope, their precisions in units of that of the noise, and the gamma prior
# of that: shape and rate.
PRIOR = np.array([3000.0, 185.0]), np.array([0.06, 6.0]), 3.0, 2 * 300.0**2
# Published evidences of strength on density and on adjusted density.
EXACT = {"pine_x": -310.128, "pine_z": -301.705}
