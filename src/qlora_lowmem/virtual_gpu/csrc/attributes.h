// What a card says about itself, in the numbering that cudaDeviceAttr and CUdevice_attribute share.
#pragma once

#include "account.h"

namespace vgpu {

VGPU_SHARED int device_attribute(int attribute, int device);
// "0000:01:00.0" for the first device.
VGPU_SHARED void pci_bus_id(int device, char* text, int capacity);
// The device of a PCI bus id, or -1.
VGPU_SHARED int device_of_pci_bus_id(const char* text);

}  // namespace vgpu
