// What a card says about itself, in the numbering that cudaDeviceAttr and CUdevice_attribute share.
#pragma once

#include "account.h"

struct cudaDeviceProp;

namespace vgpu {

VGPU_SHARED int device_attribute(int number, int device);
// The same figures, as cudaGetDeviceProperties gives them.
VGPU_SHARED void describe_device(cudaDeviceProp* properties, int device);
// "0000:01:00.0" for the machine's first device.
VGPU_SHARED void pci_bus_id(int machine_index, char* text, int capacity);
// The machine's device of a PCI bus id, or -1.
VGPU_SHARED int machine_index_of_pci_bus_id(const char* text);

}  // namespace vgpu
